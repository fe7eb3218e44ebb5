"""What a run costs a device: power, heat and clocks while it works."""
