"""What fusion computes from images: how much parameters matter, what layers read and answer, how much of each
model to take."""
