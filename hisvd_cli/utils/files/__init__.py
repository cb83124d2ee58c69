"""Files: written whole or not at all, checked, hashed, and found again."""
