"""The demo: the story of transfer learning on real digits, offline, in minutes."""
