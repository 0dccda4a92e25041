"""Where did these weights come from: digests, lineage, watermark, uncensoring, notices."""
