"""Layer 3. Proposals over the labels: one protocol (`xmc_midx.types.Sampler`), one shared contract test."""
