"""A board, one step at a time: phases, events, and who learns."""
