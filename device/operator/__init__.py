"""A person's side of MQTT: hear boards, watch a fleet, command, label."""
