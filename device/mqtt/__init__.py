"""MQTT at a board: messages, topics, the outbox and the link to a broker. Nothing here imports torch."""
