#pragma once

#include <string>
#include <string_view>

namespace tailor {

/// `address` without the password it may carry, as "scheme://user:password@host/..." or as a
/// `password` of its query; any other text as it is. What is shown, logged or stored goes through
/// this: the address still names its place, and programs find the password elsewhere (~/.pgpass,
/// PGPASSWORD).
std::string without_password(std::string_view address);

/// True when `text` is an address of `scheme` ("postgresql").
bool has_scheme(std::string_view text, std::string_view scheme);

}  // namespace tailor
