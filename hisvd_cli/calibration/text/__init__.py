"""Text by name, as tokens: named datasets, hub ids, local files, chats, generated text."""
