"""Client of OpenAI-compatible servers: requests, limits, budget, journal. Experts and judges share it."""
