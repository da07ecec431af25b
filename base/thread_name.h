#pragma once

#include <pthread.h>

namespace tailor {

/// What top, gdb and /proc/PID/task/*/comm call this thread; 15 letters at most.
inline void name_this_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace tailor
