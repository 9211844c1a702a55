"""From files to batches: sources (bytes on disk), functional (pure numpy), pipeline (grain). Never imports jax."""
