#include "adapters/merge/worker.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/units.h"
#include "data/quant/codec.h"
#include "data/quant/numbers.h"
#include "data/store/halves.h"
#include "data/store/store.h"

namespace tailor {
namespace {

constexpr std::int64_t kStripRows = 128;  ///< decoded and encoded at a time; a row of fp8 blocks

RowsToMerge::Number number_of(Dtype dtype) {
  return dtype == Dtype::bf16 ? RowsToMerge::Number::bf16 : RowsToMerge::Number::f32;
}

bool finite(const MergeSums& sums) {
  return std::isfinite(sums.base_squares) && std::isfinite(sums.delta_squares) &&
         std::isfinite(sums.error_squares) && std::isfinite(sums.kept);
}

}  // namespace

const float* e4m3_table() {
  static const std::vector<float> table = [] {
    std::vector<float> out;
    for (unsigned code = 0; code < 256; ++code) {
      const float size = e4m3_magnitude(static_cast<std::uint8_t>(code & 127U));
      out.push_back((code & 128U) != 0 ? -size : size);
    }
    return out;
  }();
  return table.data();
}

LowRankLevels runnable_low_rank_levels() {
  LowRankLevels list{};
  if (__builtin_cpu_supports("x86-64-v4")) list.levels[list.count++] = {"x86-64-v4", &kLowRankV4};
  if (__builtin_cpu_supports("x86-64-v3")) list.levels[list.count++] = {"x86-64-v3", &kLowRankV3};
  list.levels[list.count++] = {"x86-64", &kLowRankBase};
  return list;
}

PieceDigest piece_digest(std::span<const std::byte> bytes) {
  return hash_unit(bytes.data(), static_cast<std::int64_t>(bytes.size()));
}

MergeWorker::MergeWorker(const MergePlan& plan, const MergeFiles& files, FactorGroups& factors)
    : plan_(plan),
      files_(files),
      factors_(factors),
      kernels_(*runnable_low_rank_levels().levels[0].kernels),
      encode_(*runnable_encode_levels().levels[0].kernels) {}

std::int64_t MergeWorker::memory_bytes(const MergePlan& plan) {
  std::int64_t largest = 0;
  for (const MergePart& part : plan.parts) {
    const std::int64_t in = plan.inputs[part.in].pieces.piece_bytes;
    const bool in_place = part.requantised && part.scales_by_column();
    const std::int64_t out = in_place ? 0 : plan.outputs[part.out].pieces.piece_bytes;
    std::int64_t bytes = in + out + 4 * 4096;
    std::int64_t rows = 0;  // held as floats
    if (in_place) {
      rows = 3 * column_strip_rows(part) + 3;
    } else if (part.kind == MergePart::Kind::plain) {
      rows = plan.inputs[part.in].dtype == Dtype::f16 ? part.piece_rows : 0;
    } else if (part.kind != MergePart::Kind::copy) {
      rows = 3 * std::min(kStripRows, part.piece_rows);
      bytes += 2 * plan.inputs[*part.in_scales].pieces.piece_bytes * 3;
    }
    bytes += rows * part.columns * static_cast<std::int64_t>(sizeof(float));
    largest = std::max(largest, bytes);
  }
  return largest;
}

MergedPiece MergeWorker::run(const MergeJob& job) {
  const MergePart& part = plan_.parts[job.part];
  switch (part.kind) {
    case MergePart::Kind::copy:
      return copy(plan_.inputs[part.in], plan_.outputs[part.out], job);
    case MergePart::Kind::plain:
      return plain(part, job);
    case MergePart::Kind::fp8:
    case MergePart::Kind::int4:
      take_terms(part, job);
      // Where nothing is added, encoding again would only lose.
      if (part.requantised && terms_.count == 0) return copy_encoded(part, job);
      return part.requantised && part.scales_by_column() ? columns(part, job)
                                                         : quantised(part, job);
  }
  TAILOR_CHECK(false, "kind of a part");
}

void MergeWorker::write(const MergeTensor& tensor, std::int64_t offset,
                        std::span<const std::byte> bytes) const {
  TAILOR_CHECK(offset >= 0 && offset + static_cast<std::int64_t>(bytes.size()) <= tensor.bytes,
               tensor.name);
  files_.targets[tensor.file]->write(tensor.offset + offset, bytes);
}

/// A piece of a tensor whose bytes do not change.
MergedPiece MergeWorker::copy(const MergeTensor& in, const MergeTensor& out, const MergeJob& job) {
  const std::int64_t begin = job.slice * in.pieces.slice_bytes + job.piece * in.pieces.piece_bytes;
  const std::int64_t bytes =
      std::min(in.pieces.piece_bytes, in.pieces.slice_bytes - job.piece * in.pieces.piece_bytes);
  const std::byte* from = files_.sources[in.file]->read(in.offset + begin, bytes, in_);
  MergedPiece done;
  done.in = done.out = piece_digest(span_of(from, bytes));
  if ((in.offset - out.offset) % 4096 != 0) {
    std::byte* to = SliceTarget::at(out.offset + begin, bytes, out_);
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    from = to;
  }
  write(out, begin, span_of(from, bytes));
  return done;
}

void MergeWorker::take_terms(const MergePart& part, const MergeJob& job) {
  terms_.groups.clear();
  terms_.vectors.clear();
  terms_.count = 0;
  const std::int64_t expert = part.expert + job.slice / part.slices_a_expert;
  for (const MergeTerm& term : part.terms) {
    auto group = factors_.get(term.adapter, term.site, expert);
    if (term.scale == 0 || group->is_zero(expert)) {
      terms_.groups.push_back(nullptr);
      continue;
    }
    for (std::int64_t r = 0; r < group->rank; ++r) {
      terms_.vectors.push_back(part.inputs_first ? group->b_of(expert) + r * group->out
                                                 : group->a_of(expert) + r * group->in);
    }
    terms_.count += group->rank;
    terms_.groups.push_back(std::move(group));
  }
}

/// One number a row and term: the scale is in it, rounded once.
void MergeWorker::fill_coefficients(const MergePart& part, const MergeJob& job,
                                    std::int64_t first_row, std::int64_t rows) {
  const std::int64_t expert = part.expert + job.slice / part.slices_a_expert;
  const std::int64_t first =
      part.first_output + job.slice % part.slices_a_expert * part.slice_rows + first_row;
  terms_.coefficients.resize(static_cast<std::size_t>(rows * terms_.count));
  std::int64_t at = 0;
  for (std::size_t i = 0; i < part.terms.size(); ++i) {
    const auto& group = terms_.groups[i];
    if (!group) continue;
    const float* from = part.inputs_first ? group->a_of(expert) : group->b_of(expert);
    const std::int64_t stride = part.inputs_first ? group->in : group->out;
    for (std::int64_t r = 0; r < group->rank; ++r, ++at) {
      for (std::int64_t k = 0; k < rows; ++k) {
        terms_.coefficients[static_cast<std::size_t>(k * terms_.count + at)] = static_cast<float>(
            part.terms[i].scale * static_cast<double>(from[r * stride + first + k]));
      }
    }
  }
}

void MergeWorker::check_sums(const MergePart& part, const MergeJob& job, std::int64_t first_row,
                             const MergeSums& sums, const float* values, std::int64_t rows) const {
  if (finite(sums)) return;
  for (std::int64_t i = 0; i < rows * part.columns; ++i) {
    if (std::isfinite(values[i])) continue;
    const MergeTensor& in = plan_.inputs[part.in];
    throw Error(
        Fault::bad_file,
        {"a merged weight is infinite or not a number",
         plan_.shards[in.file].source.string() + ", tensor " + in.name + ", " +
             (part.slices > 1 ? "slice " + std::to_string(job.slice) + ", " : "") + "row " +
             std::to_string(first_row + i / part.columns) + ", column " +
             std::to_string(i % part.columns),
         "The base is damaged, or the adapter's run diverged. Check both with the program that "
         "wrote them."});
  }
}

MergedPiece MergeWorker::plain(const MergePart& part, const MergeJob& job) {
  const MergeTensor &in = plan_.inputs[part.in], &out = plan_.outputs[part.out];
  take_terms(part, job);
  if (terms_.count == 0 && in.dtype == out.dtype) return copy(in, out, job);
  const auto [first, rows] = plan_.rows_of(job);
  const std::int64_t count = rows * part.columns;
  const std::int64_t begin = job.slice * in.pieces.slice_bytes + job.piece * in.pieces.piece_bytes;
  const std::int64_t bytes = count * dtype_bytes(in.dtype);
  const std::byte* from = files_.sources[in.file]->read(in.offset + begin, bytes, in_);
  MergedPiece done;
  done.in = piece_digest(span_of(from, bytes));

  const std::int64_t out_begin =
      job.slice * out.pieces.slice_bytes + job.piece * out.pieces.piece_bytes;
  const std::int64_t out_bytes = count * dtype_bytes(out.dtype);
  std::byte* to = SliceTarget::at(out.offset + out_begin, out_bytes, out_);
  const bool half_in = in.dtype == Dtype::f16, half_out = out.dtype == Dtype::f16;
  if (half_in) {
    base_.resize(static_cast<std::size_t>(count));
    widen(in.dtype, from, count, base_.data());
  }
  if (half_out) target_.resize(static_cast<std::size_t>(count));
  fill_coefficients(part, job, first, rows);
  RowsToMerge work;
  // Safetensors do not promise that numbers lie at multiples of their size; the kernels do not ask.
  work.base = half_in ? static_cast<const void*>(base_.data()) : from;
  work.base_number = half_in ? RowsToMerge::Number::f32 : number_of(in.dtype);
  work.out = half_out ? static_cast<void*>(target_.data()) : to;
  work.out_number = half_out ? RowsToMerge::Number::f32 : number_of(out.dtype);
  work.rows = rows;
  work.columns = part.columns;
  work.terms = terms_.count;
  work.coefficients = terms_.coefficients.data();
  work.vectors = terms_.vectors.data();
  kernels_.merge(work, &done.sums);
  if (half_out) {
    stored_.resize(static_cast<std::size_t>(count));
    auto* halves = reinterpret_cast<std::uint16_t*>(to);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      // Of NaN an infinity: the sums tell of both.
      const std::uint16_t bits = half_from_float(target_[at]);
      stored_[at] = half_to_float(bits);
      std::memcpy(halves + i, &bits, sizeof bits);
    }
    done.sums.kept = 0;
    kernels_.compare(base_.data(), target_.data(), stored_.data(), count, &done.sums);
  }
  if (!finite(done.sums)) {
    target_.resize(static_cast<std::size_t>(count));
    widen(out.dtype, to, count, target_.data());
    check_sums(part, job, first, done.sums, target_.data(), rows);
  }
  if (part.terms.empty()) done.sums = {};  // a conversion
  done.out = piece_digest(span_of(to, out_bytes));
  write(out, out_begin, span_of(to, out_bytes));
  return done;
}

/// Rows of fp8 with `scales`, or of INT4 with `raw_scales` of `type`, as floats.
void MergeWorker::decode(const MergePart& part, const EncodedRows& rows, float* out) const {
  const std::int64_t columns = part.columns;
  if (part.scales_by_column()) {
    for (std::int64_t row = 0; row < rows.count; ++row) {
      kernels_.scale_columns(reinterpret_cast<const std::uint8_t*>(rows.codes) + row * columns,
                             e4m3_table(), rows.scales, columns, out + row * columns);
    }
    return;
  }
  if (part.kind == MergePart::Kind::fp8) {
    const std::int64_t width = part.format.block_columns, across = div_ceil(columns, width);
    for (std::int64_t row = 0; row < rows.count; ++row) {
      const float* scales = rows.scales + row / part.format.block_rows * across;
      for (std::int64_t c = 0; c < columns; c += width) {
        kernels_.scale_codes(reinterpret_cast<const std::uint8_t*>(rows.codes) + row * columns + c,
                             e4m3_table(), *scales++, std::min(width, columns - c),
                             out + row * columns + c);
      }
    }
    return;
  }
  if (rows.scales == nullptr) {  // bfloat16, which the values are rounded to as well
    decode_rows({part.format, rows.count, columns, rows.codes, rows.raw_scales}, 0, rows.count,
                out);
    return;
  }
  // compressed-tensors multiplies in the scale's own type, so the product is rounded to it.
  const std::int64_t row_words = div_ceil(columns, 8),
                     groups = div_ceil(columns, part.format.group);
  for (std::int64_t r = 0; r < rows.count; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      std::uint32_t word = 0;
      std::memcpy(&word, rows.codes + 4 * (r * row_words + c / 8), sizeof word);
      const auto code = static_cast<int>(word >> (4U * static_cast<unsigned>(c % 8)) & 15U) - 8;
      const float value =
          static_cast<float>(code) * rows.scales[r * groups + c / part.format.group];
      *out++ = rows.scale_type == Dtype::f16 ? rounded_to_half(value) : value;
    }
  }
}

MergedPiece MergeWorker::copy_encoded(const MergePart& part, const MergeJob& job) {
  const MergedPiece codes = copy(plan_.inputs[part.in], plan_.outputs[part.out], job);
  const MergedPiece scales =
      copy(plan_.inputs[*part.in_scales], plan_.outputs[*part.out_scales], job);
  return {codes.in, codes.out, scales.in, scales.out, {}};
}

/// The factors' rows [first, first + rows) of the slice are added to base_, into target_.
void MergeWorker::add_to_strip(const MergePart& part, const MergeJob& job, std::int64_t first,
                               std::int64_t rows, MergeSums* sums) {
  fill_coefficients(part, job, first, rows);
  RowsToMerge work;
  work.base = base_.data();
  work.base_number = work.out_number = RowsToMerge::Number::f32;
  work.out = target_.data();
  work.rows = rows;
  work.columns = part.columns;
  work.terms = terms_.count;
  work.coefficients = terms_.coefficients.data();
  work.vectors = terms_.vectors.data();
  kernels_.merge(work, sums);
  check_sums(part, job, first, *sums, target_.data(), rows);
  sums->kept = 0;  // of what is stored, which is not known yet
}

/// New scales of a piece of fp8, in the type of the base's.
void MergeWorker::write_scales(const MergePart& part, const MergeJob& job,
                               const std::vector<float>& scales, MergedPiece* done) {
  const MergeTensor& to = plan_.outputs[*part.out_scales];
  std::vector<std::byte> bytes(scales.size() * static_cast<std::size_t>(dtype_bytes(to.dtype)));
  if (to.dtype == Dtype::f32) {
    std::memcpy(bytes.data(), scales.data(), bytes.size());
  } else {
    for (std::size_t i = 0; i < scales.size(); ++i) {
      const std::uint16_t bits = bf16_from_float(scales[i]);
      std::memcpy(bytes.data() + 2 * i, &bits, sizeof bits);
    }
  }
  done->out_scales = piece_digest(bytes);
  write(to, job.slice * to.pieces.slice_bytes + job.piece * to.pieces.piece_bytes, bytes);
}

MergedPiece MergeWorker::quantised(const MergePart& part, const MergeJob& job) {
  const MergeTensor &in = plan_.inputs[part.in], &out = plan_.outputs[part.out];
  const MergeTensor& in_scales = plan_.inputs[*part.in_scales];
  const bool fp8 = part.kind == MergePart::Kind::fp8, by_column = part.scales_by_column();
  const auto [first, rows] = plan_.rows_of(job);
  const std::int64_t row_bytes = code_bytes(part.format, 1, part.columns);
  const std::int64_t codes_bytes = rows * row_bytes;
  const std::byte* codes = files_.sources[in.file]->read(
      in.offset + job.slice * in.pieces.slice_bytes + job.piece * in.pieces.piece_bytes,
      codes_bytes, in_);
  const std::int64_t block_rows = fp8 ? part.format.block_rows : 1;
  const std::int64_t across =
      div_ceil(part.columns, fp8 ? part.format.block_columns : part.format.group);
  const std::int64_t scale_count = by_column ? part.columns : div_ceil(rows, block_rows) * across;
  const std::int64_t scale_size = dtype_bytes(in_scales.dtype);
  const std::int64_t scales_begin = job.slice * in_scales.pieces.slice_bytes +
                                    (by_column ? 0 : job.piece * in_scales.pieces.piece_bytes);
  const std::byte* scales = files_.sources[in_scales.file]->read(
      in_scales.offset + scales_begin, scale_count * scale_size, in_scales_);
  MergedPiece done;
  done.in = piece_digest(span_of(codes, codes_bytes));
  done.in_scales = piece_digest(span_of(scales, scale_count * scale_size));
  std::vector<float> all_scales;
  if (fp8 || in_scales.dtype != Dtype::bf16) {
    all_scales.resize(static_cast<std::size_t>(scale_count));
    widen(in_scales.dtype, scales, scale_count, all_scales.data());
  }

  const std::int64_t out_row = part.requantised ? row_bytes : part.columns * dtype_bytes(out.dtype);
  const std::int64_t out_begin =
      job.slice * out.pieces.slice_bytes + job.piece * out.pieces.piece_bytes;
  std::byte* to = SliceTarget::at(out.offset + out_begin, rows * out_row, out_);
  // The encoder wants its own memory: places in the file are of any alignment.
  std::vector<std::byte> encoded, encoded_scales, new_scales;
  std::vector<float> new_fp8_scales;
  const Fp8Scales fp8_scales = in_scales.dtype == Dtype::bf16 ? Fp8Scales::bf16 : Fp8Scales::f32;
  const std::int64_t strip = std::min(kStripRows, rows);
  base_.resize(static_cast<std::size_t>(strip * part.columns));
  target_.resize(base_.size());
  stored_.resize(base_.size());
  for (std::int64_t at = 0; at < rows; at += strip) {
    const std::int64_t count = std::min(strip, rows - at);
    EncodedRows strip_rows{count, codes + at * row_bytes, in_scales.dtype};
    const std::int64_t first_scale = by_column ? 0 : at / block_rows * across;
    strip_rows.scales = all_scales.empty() ? nullptr : all_scales.data() + first_scale;
    strip_rows.raw_scales = scales + first_scale * scale_size;
    decode(part, strip_rows, base_.data());
    MergeSums sums;
    add_to_strip(part, job, first + at, count, &sums);
    if (part.requantised) {
      encoded.resize(static_cast<std::size_t>(count * row_bytes));
      encoded_scales.resize(
          static_cast<std::size_t>(scale_bytes(part.format, count, part.columns)));
      MatrixEncoder encoder(part.format, count, part.columns, encoded.data(), encoded_scales.data(),
                            {Int4Scales::positive, fp8_scales});
      encoder.add_rows(0, count, target_.data());
      static_cast<void>(encoder.finish());
      EncodedRows stored{count, encoded.data(), in_scales.dtype};
      stored.raw_scales = encoded_scales.data();
      if (fp8) {
        const auto* floats = reinterpret_cast<const float*>(encoded_scales.data());
        new_fp8_scales.insert(new_fp8_scales.end(), floats,
                              floats + encoded_scales.size() / sizeof(float));
        stored.scales = floats;
      } else {
        new_scales.insert(new_scales.end(), encoded_scales.begin(), encoded_scales.end());
      }
      decode(part, stored, stored_.data());
      std::memcpy(to + at * out_row, encoded.data(), encoded.size());
    } else if (out.dtype == Dtype::f32) {
      std::memcpy(to + at * out_row, target_.data(),
                  static_cast<std::size_t>(count * part.columns) * sizeof(float));
      std::copy(target_.begin(), target_.end(), stored_.begin());
    } else {
      for (std::int64_t i = 0; i < count * part.columns; ++i) {
        const std::uint16_t bits = bf16_from_float(target_[static_cast<std::size_t>(i)]);
        std::memcpy(to + at * out_row + 2 * i, &bits, sizeof bits);
        stored_[static_cast<std::size_t>(i)] = bf16_to_float(bits);
      }
    }
    kernels_.compare(base_.data(), target_.data(), stored_.data(), count * part.columns, &sums);
    done.sums.add(sums);
  }
  if (terms_.count == 0) done.sums = {};
  done.out = piece_digest(span_of(to, rows * out_row));
  write(out, out_begin, span_of(to, rows * out_row));
  if (part.requantised && fp8) {
    write_scales(part, job, new_fp8_scales, &done);
  } else if (part.requantised) {
    const MergeTensor& to_scales = plan_.outputs[*part.out_scales];
    done.out_scales = piece_digest(new_scales);
    write(to_scales, scales_begin, new_scales);
  }
  return done;
}

}  // namespace tailor
