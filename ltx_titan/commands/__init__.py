"""The commands of `ltx-titan`, one file each."""
