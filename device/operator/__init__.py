"""An operator's side of MQTT: watch boards, send commands, label frames."""
