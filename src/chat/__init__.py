"""Client of OpenAI-compatible servers: messages in, reply and usage out. Experts and judges share it."""
