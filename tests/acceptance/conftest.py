from tests.support.threads import threads as threads
