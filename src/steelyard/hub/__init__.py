"""Where models come from: package wheels, a model hub, local folders. The only room that downloads."""
