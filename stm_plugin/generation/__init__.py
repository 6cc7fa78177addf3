"""The paper's other two systems: answers that a model writes itself, or rewrites, in the place of people's."""
