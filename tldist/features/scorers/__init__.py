"""Scorers: which model suits a target domain best, found without the target's labels."""
