"""Answers of servers with the OpenAI API; nothing of them is used before it was checked."""
