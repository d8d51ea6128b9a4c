"""From an artifact to answers. Never imports torch, except in the torch engine itself."""
