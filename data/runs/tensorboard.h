#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/file.h"

namespace tailor {

/// Writes an event file that TensorBoard reads: TFRecord frames (length, masked CRC-32C, payload,
/// masked CRC-32C) around hand-encoded `tensorflow.Event` messages. No dependency.
class TensorboardWriter {
 public:
  /// Makes <folder>/events.out.tfevents.<seconds>.<host>.<pid>.<number>. With `resumed_from_step`
  /// TensorBoard is told to forget what older files of the folder say of later steps.
  TensorboardWriter(const fs::path& folder, const Clock& clock, std::int64_t resumed_from_step = 0);

  void scalar(std::string_view tag, double value, std::int64_t step);
  /// Shown as Markdown on the Text page.
  void text(std::string_view tag, std::string_view markdown, std::int64_t step = 0);
  /// Hands what was written to the kernel; call once a step.
  void flush();

  const fs::path& path() const noexcept { return path_; }

 private:
  void record(std::string_view event);
  double now() const;

  const Clock& clock_;
  fs::path path_;
  std::unique_ptr<FileWriter> file_;
};

/// CRC-32C (Castagnoli) of RFC 3720, and its rotated form as TFRecord stores it.
std::uint32_t crc32c(std::string_view bytes);
std::uint32_t masked_crc32c(std::string_view bytes);

}  // namespace tailor
