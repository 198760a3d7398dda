"""An HTTP server that speaks OpenAI's completion and chat protocols in front of a serving engine."""
