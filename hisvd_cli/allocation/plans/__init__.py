"""The rows of a plan, and the checks that its values agree."""
