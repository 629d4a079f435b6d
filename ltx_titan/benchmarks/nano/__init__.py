"""The recipe of the trained miniature pack, and its scores."""
