"""All exercises, in the order of the course."""
from course.exercises import adapters, conversations, language, llamas, preferences, reinforcement, rewards

CHAPTERS = (language, llamas, conversations, adapters, rewards, preferences, reinforcement)
EXERCISES = {exercise.name: exercise for chapter in CHAPTERS for exercise in chapter.EXERCISES}
