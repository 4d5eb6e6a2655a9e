"""OpenAI-compatible server: `service.ChatService` (no sockets), `app` (fastapi), `schemas`."""
