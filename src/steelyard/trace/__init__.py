"""Where do these weights come from: lineage, watermark, uncensoring, notices."""
