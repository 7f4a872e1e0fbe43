"""What docs/objectives.md states as numbers and pictures, computed on the exact oracle. Nothing is sampled."""
