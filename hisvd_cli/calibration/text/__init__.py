"""Loads and tokenizes text: named datasets, Hub ids, local files, chats and generated text."""
