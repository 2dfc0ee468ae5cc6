"""Loading and saving; replaced soon. The surface other rooms may rely on."""
