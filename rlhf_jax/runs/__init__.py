"""What a run leaves on disk, and how it is found again. `listing` and `directory` import no jax."""
