"""A deployment on one machine: streams, reports, brokers for one run, fleets."""
