"""The adapter itself: torch and safetensors, never transformers."""
