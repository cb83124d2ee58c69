"""Text by name, as token ids: named datasets, hub ids, local files, chats and generated text."""
