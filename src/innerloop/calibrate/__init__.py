"""How early a loop may stop: thresholds chosen on data."""
