#pragma once

namespace tailor {

/// Cores this process may run on, as its affinity says; 1 where the system does not.
int usable_cores();

}  // namespace tailor
