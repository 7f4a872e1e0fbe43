"""What a user may say, in one typed schema: defaults live here and nowhere else. Imports no torch."""
