"""Races against what a user would pick instead: time and memory beside a named peer, in the same run."""
