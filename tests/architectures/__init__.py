"""Every decoder of the installed transformers, as a tiny random model, through every command."""
