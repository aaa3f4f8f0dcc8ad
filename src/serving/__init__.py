"""The server: OpenAI's chat-completions protocol in front of one model."""
