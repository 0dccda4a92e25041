"""The test: batteries of probes, the journal, statistics, the report. It measures and never decides on a release."""
