"""From a config to ``Prepared``: every fault at once, and the plan; and a first config."""
