"""What is wrong with this machine or this job, and what to do about it."""
