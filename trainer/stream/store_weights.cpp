#include "trainer/stream/store_weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>

#include "base/aligned_memory.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "recipes/ring.h"
#include "recipes/tile_homes.h"
#include "trainer/ops.h"
#include "trainer/stream/gathered_tiles.h"
#include "trainer/stream/row_cache.h"

namespace tailor {
namespace {

enum Pool { kAttentionPool, kFeedForwardPool, kExpertPool, kHeadPool, kPools };

template <class S>
void decode_with(const EncodedMatrix& matrix, S* out, std::int64_t stride) {
  at::parallel_for(0, matrix.rows, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    kernels<S>().dequantise(begin, end, matrix, out + begin * stride, stride);
  });
}

/// Decodes a matrix into rows of `out`, of any of the blocks' dtypes.
void decode(const EncodedMatrix& matrix, const at::Tensor& out) {
  const std::int64_t stride = out.stride(0);
  switch (out.scalar_type()) {
    case at::kDouble:
      return decode_with(matrix, data<double>(out), stride);
    case at::kFloat:
      return decode_with(matrix, data<float>(out), stride);
    default:
      return decode_with(matrix, data<Bf16>(out), stride);
  }
}

/// Whether codes are the numbers themselves.
bool stored_as(const EncodedMatrix& matrix, at::ScalarType dtype) {
  return (matrix.format.kind == WeightKind::bf16 && dtype == at::kBFloat16) ||
         (matrix.format.kind == WeightKind::f32 && dtype == at::kFloat);
}

at::Tensor view_of(const std::byte* codes, at::IntArrayRef shape, at::ScalarType dtype) {
  return at::from_blob(const_cast<std::byte*>(codes), shape, at::TensorOptions(dtype));
}

/// Matrices with one input as one tensor of all their rows: a view where they lie side by side in
/// the blocks' dtype, else decoded.
at::Tensor stacked(std::span<const EncodedMatrix> matrices, at::ScalarType dtype,
                   TensorStack& scratch) {
  const std::int64_t columns = matrices[0].columns;
  std::int64_t rows = 0;
  bool plain = true;
  for (const EncodedMatrix& matrix : matrices) {
    plain = plain && stored_as(matrix, dtype) &&
            matrix.codes == matrices[0].codes +
                                rows * columns * static_cast<std::int64_t>(c10::elementSize(dtype));
    rows += matrix.rows;
  }
  if (plain) return view_of(matrices[0].codes, {rows, columns}, dtype);
  const at::Tensor out = scratch.take({rows, columns}, dtype);
  std::int64_t at = 0;
  for (const EncodedMatrix& matrix : matrices) {
    decode(matrix, out.narrow(0, at, matrix.rows));
    at += matrix.rows;
  }
  return out;
}

/// A store's units, cut into tiles, with numbers that tell where each is.
struct TileMap {
  std::vector<RingTile> tiles;
  std::vector<std::vector<const StoredUnit*>> units;  ///< of each tile
  std::vector<int> attention, feed_forward;           ///< tile of each layer
  std::vector<int> first_expert_tile;                 ///< of each layer; -1: dense
  std::vector<int> head;                              ///< tile of each vocabulary run
  std::int64_t experts_per_tile = 0, expert_tiles = 0;
};

class StoreStream final : public StoreWeights {
 public:
  StoreStream(std::shared_ptr<const Store> store, at::ScalarType dtype,
              const StreamOptions& options)
      : store_(std::move(store)), spec_(store_->spec()), dtype_(dtype) {
    cut_tiles(options);
    share_tiles(options.ranks);
    choose_tile_homes(options);
    BlockReader::Options reader_options = options.reader;
    auto reader = BlockReader::create(reader_options);
    for (std::size_t f = 0; f < store_->layout().files.size(); ++f) {
      reader->add_file(inside_folder(store_->folder(), store_->layout().files[f].name));
    }
    if (options.wrap_reader) reader = options.wrap_reader(std::move(reader));
    checked_.assign(map_.tiles.size(), 0);
    facts_.reader = reader->facts();
    const auto whole_tile = [this](int tile, const std::byte* bytes) { check(tile, bytes); };
    TileRing::Checks checks{whole_tile, [this](int part, const BlockDone& done) {
                              return failed(tile_of_part_[static_cast<std::size_t>(part)], done);
                            }};
    const std::vector<RingPool> slots = pools();
    if (facts_.ranks > 1) {
      TAILOR_CHECK(options.device == nullptr);
      checks.check = {};  // a part alone has no hash
      ring_ = std::make_unique<GatheredTiles>(
          map_.tiles, part_of_tile_, gather_pools(),
          std::make_unique<TileRing>(parts_, slots, std::move(reader), checks),
          options.ranks->channel("tiles"), whole_tile);
    } else if (options.device == nullptr) {
      ring_ = std::make_unique<TileRing>(parts_, slots, std::move(reader), checks);
    } else {
      ring_ = std::make_unique<DeviceRing>(*options.device, parts_, slots, device_pools(),
                                           std::move(reader), checks,
                                           DeviceRing::Options{{}, options.poison_released});
    }
    load_norm(options);
  }

  const ModelSpec& spec() const override { return spec_; }

  void begin(Pass pass, bool again) override {
    const std::vector<int>& order = order_of(pass);
    ring_->begin(order);
    if (again) ring_->expect(order);
  }

  Lease attention(std::int64_t layer, LayerWeights& out, TensorStack& scratch) override {
    const int tile = map_.attention[static_cast<std::size_t>(layer)];
    Lease lease = acquire(tile);
    place(*unit_of(tile, 0), lease, scratch, out,
          [](auto&&... parts) { place_attention(parts...); });
    return lease;
  }

  Lease feed_forward(std::int64_t layer, LayerWeights& out, TensorStack& scratch) override {
    const int tile = map_.feed_forward[static_cast<std::size_t>(layer)];
    Lease lease = acquire(tile);
    place(*unit_of(tile, 0), lease, scratch, out,
          [](auto&&... parts) { place_feed_forward(parts...); });
    return lease;
  }

  std::int64_t expert_tiles() const override { return map_.expert_tiles; }

  ExpertTile experts(std::int64_t layer, std::int64_t tile) override {
    const std::int64_t first = tile * map_.experts_per_tile;
    return {acquire(map_.first_expert_tile[static_cast<std::size_t>(layer)] + narrow<int>(tile)),
            layer, first, std::min(map_.experts_per_tile, spec_.experts - first)};
  }

  ExpertWeights expert(const ExpertTile& tile, std::int64_t expert, std::int64_t rows,
                       TensorStack& scratch) override {
    const int index = map_.first_expert_tile[static_cast<std::size_t>(tile.layer)] +
                      narrow<int>(tile.first / map_.experts_per_tile);
    const StoredUnit& unit = *unit_of(index, static_cast<std::size_t>(expert - tile.first));
    const auto matrices =
        matrices_of(unit, tile.lease.bytes() +
                              (unit.offset - map_.tiles[static_cast<std::size_t>(index)].offset));
    return {for_products(std::span(&matrices[0], 2), rows, scratch),
            for_products(std::span(&matrices[2], 1), rows, scratch)};
  }

  at::Tensor final_norm_D() override { return norm_D_; }
  std::int64_t head_runs() const override { return narrow<std::int64_t>(map_.head.size()); }

  HeadRun head(std::int64_t run, TensorStack& scratch) override {
    const int tile = map_.head[static_cast<std::size_t>(run)];
    HeadRun out;
    out.lease = acquire(tile);
    const StoredUnit& unit = *unit_of(tile, 0);
    out.first = unit.id.index;
    const auto matrices = matrices_of(unit, out.lease.bytes());
    out.w_VD = stacked(matrices, dtype_, scratch);
    return out;
  }

  void embed(std::span<const std::int32_t> ids, const at::Tensor& out_TD) override {
    std::map<std::int32_t, std::vector<std::int64_t>> tokens_of;  // each row is read once
    for (std::size_t t = 0; t < ids.size(); ++t) {
      tokens_of[ids[t]].push_back(static_cast<std::int64_t>(t));
    }
    if (embedding_.size() > 0) {
      for (const auto& [id, tokens] : tokens_of) {
        const auto [unit, row] = embedding_row(id);
        copy_row(unit->matrices[0].in(embedding_.data() + unit->offset), row, tokens, out_TD);
      }
      return;
    }
    std::erase_if(tokens_of, [&](const auto& row) {
      const std::byte* const codes = rows_kept_.find(row.first);
      if (codes == nullptr) return false;
      copy_row({row_format(), 1, spec_.hidden, codes, nullptr}, 0, row.second, out_TD);
      return true;
    });
    read_rows(tokens_of, out_TD);
  }

  std::int64_t memory_bytes() const override {
    return ring_->memory_bytes() + embedding_.size() + rows_kept_.memory_bytes();
  }
  RingCounters counters() const override {
    RingCounters out = ring_->counters();
    out.streamed_bytes += row_bytes_;
    out.row_bytes = row_bytes_;
    out.stall_seconds += row_stall_seconds_;
    return out;
  }
  StreamFacts facts() const override { return facts_; }

  void read_through(Pass pass) override {
    begin(pass, false);
    for (const int tile : order_of(pass)) acquire(tile);
  }

 private:
  /// As stored where few rows are multiplied, else decoded.
  ops::ProductWeights for_products(std::span<const EncodedMatrix> matrices, std::int64_t rows,
                                   TensorStack& scratch) const {
    const std::int64_t all_rows = StoredParts{matrices.data(), std::ssize(matrices)}.rows();
    ops::ProductWeights out;
    if (dtype_ != at::kBFloat16 ||
        !std::all_of(matrices.begin(), matrices.end(), [&](const EncodedMatrix& matrix) {
          return ops::multiplies_stored(matrix, all_rows, rows);
        })) {
      out.w_KN = stacked(matrices, dtype_, scratch).t();
      return out;
    }
    std::copy(matrices.begin(), matrices.end(), out.stored.begin());
    out.stored_count = std::ssize(matrices);
    return out;
  }

  template <class Place>
  void place(const StoredUnit& unit, const Lease& lease, TensorStack& scratch, LayerWeights& out,
             const Place& place_part) const {
    const auto matrices = matrices_of(unit, lease.bytes());
    place_part(
        matrices.size(), [&](std::size_t i) { return unit.matrices[i].role; },
        [&](std::size_t i, std::size_t n) {
          return stacked(std::span(matrices).subspan(i, n), dtype_, scratch);
        },
        [&](std::size_t i, bool wide) {
          return stacked(std::span(matrices).subspan(i, 1), wide ? at::kFloat : dtype_, scratch)[0];
        },
        out);
  }

  // ------------------------------------------------------------------ tiles
  void cut_tiles(const StreamOptions& options) {
    const StoreLayout& layout = store_->layout();
    std::int64_t expert_bytes = 0;
    for (const StoredUnit& unit : layout.units) {
      if (unit.id.kind == UnitKind::expert) expert_bytes = std::max(expert_bytes, unit.bytes);
    }
    if (expert_bytes > 0) {
      map_.experts_per_tile = options.experts_per_tile > 0
                                  ? std::min(options.experts_per_tile, spec_.experts)
                                  : tailor::experts_per_tile(expert_bytes, spec_.experts);
      map_.expert_tiles = div_ceil(spec_.experts, map_.experts_per_tile);
    }
    for (std::int64_t l = 0; l < spec_.layer_count(); ++l) {
      map_.attention.push_back(add_tile({wanted({UnitKind::attention, l, 0})}, kAttentionPool));
      map_.feed_forward.push_back(
          add_tile({wanted({UnitKind::feed_forward, l, 0})}, kFeedForwardPool));
      map_.first_expert_tile.push_back(-1);
      if (!spec_.layers[static_cast<std::size_t>(l)].moe) continue;
      map_.first_expert_tile.back() = narrow<int>(narrow<std::int64_t>(map_.tiles.size()));
      for (std::int64_t e = 0; e < spec_.experts; e += map_.experts_per_tile) {
        std::vector<const StoredUnit*> units;
        for (std::int64_t i = e; i < std::min(spec_.experts, e + map_.experts_per_tile); ++i) {
          units.push_back(wanted({UnitKind::expert, l, i}));
        }
        add_tile(units, kExpertPool);
      }
    }
    const UnitKind kind = spec_.tied_head ? UnitKind::embedding : UnitKind::head;
    const std::int64_t run = vocabulary_run_rows(spec_);
    for (std::int64_t row = 0; row < spec_.vocab; row += run) {
      map_.head.push_back(add_tile({wanted({kind, 0, row})}, kHeadPool));
    }
  }

  const StoredUnit* wanted(const UnitId& id) const {
    const StoredUnit* unit = store_->layout().find(id);
    if (unit == nullptr) {
      throw Error(Fault::bad_file, {"the store lacks " + unit_text(id), store_->folder().string(),
                                    "Pack the model again: tailor model pack."});
    }
    return unit;
  }

  int add_tile(const std::vector<const StoredUnit*>& units, int pool) {
    RingTile tile;
    tile.file = narrow<int>(units.front()->file);
    tile.offset = units.front()->offset;
    tile.pool = pool;
    for (const StoredUnit* unit : units) {
      if (unit->file != units.front()->file || unit->offset != tile.offset + tile.bytes) {
        throw Error(Fault::bad_file, {"the experts of a layer do not lie side by side",
                                      store_->where(*unit), "Pack the model again."});
      }
      tile.bytes += unit->bytes;
    }
    map_.tiles.push_back(tile);
    map_.units.push_back(units);
    return narrow<int>(narrow<std::int64_t>(map_.tiles.size()) - 1);
  }

  /// What of every tile this rank reads.
  void share_tiles(const Ranks* ranks) {
    facts_.ranks = ranks == nullptr ? 1 : ranks->size();
    const int rank = ranks == nullptr ? 0 : ranks->rank();
    for (std::size_t t = 0; t < map_.tiles.size(); ++t) {
      const TileShare share = tile_share(map_.tiles[t].bytes, rank, facts_.ranks);
      const bool of_head = map_.tiles[t].pool == kHeadPool;
      facts_.tile_bytes.add(map_.tiles[t].bytes, of_head);
      facts_.gathered.add(map_.tiles[t].bytes - share.bytes, of_head);
      part_of_tile_.push_back(share.bytes == 0 ? -1 : narrow<int>(std::ssize(parts_)));
      if (share.bytes == 0) continue;
      tile_of_part_.push_back(narrow<int>(narrow<std::int64_t>(t)));
      RingTile part = map_.tiles[t];
      part.offset += share.offset;
      part.bytes = share.bytes;
      parts_.push_back(part);
    }
  }

  /// Of this rank's tiles, the largest sum of a layer's experts.
  std::int64_t layer_expert_bytes() const {
    std::int64_t largest = 0;
    for (const int first : map_.first_expert_tile) {
      std::int64_t bytes = 0;
      for (int t = first; first >= 0 && t < first + map_.expert_tiles; ++t) {
        const int part = part_of_tile_[static_cast<std::size_t>(t)];
        if (part >= 0) bytes += parts_[static_cast<std::size_t>(part)].bytes;
      }
      largest = std::max(largest, bytes);
    }
    return largest;
  }

  void choose_tile_homes(const StreamOptions& options) {
    std::vector<PassTile> pass;
    std::int64_t total = 0;
    facts_.smallest_budget = parts_.front().bytes;
    for (const RingTile& tile : parts_) {
      pass.push_back({.bytes = tile.bytes, .once = tile.pool == kHeadPool});
      total += tile.bytes;
      facts_.smallest_budget = std::min(facts_.smallest_budget, tile.bytes);
    }
    std::int64_t device = options.device_bytes.value_or(options.host_bytes ? 0 : total);
    std::int64_t host = options.host_bytes.value_or(0);
    ring_bytes_ = options.ring_bytes;
    if (ring_bytes_ == 0) {
      // On the CPU both budgets are RAM, and slots are paid for from the one for RAM first.
      const std::int64_t elsewhere = options.device == nullptr ? 0 : device;
      const std::int64_t ram = device + host - elsewhere;
      const BudgetShare share = share_budget(ram, total - elsewhere, layer_expert_bytes());
      const std::int64_t slots = ram - share.resident_bytes;
      ring_bytes_ = share.ring_bytes;
      device -= std::max<std::int64_t>(0, slots - host);
      host -= std::min(host, slots);
    }
    const auto chosen = choose_homes(pass, device, host);
    if (const auto* small = std::get_if<BudgetTooSmall>(&chosen)) {
      throw Error(Fault::does_not_fit, small->parts());
    }
    const TileHomes& homes = std::get<TileHomes>(chosen);
    for (std::size_t t = 0; t < homes.homes.size(); ++t) {
      parts_[t].home = homes.homes[t];
      facts_.tiles_resident += homes.homes[t] == TileHome::disk ? 0 : 1;
    }
    facts_.streamed = {homes.disk_bytes, homes.disk_once_bytes};
    facts_.resident_bytes = homes.device_bytes + homes.host_bytes;
    facts_.tiles = narrow<std::int64_t>(map_.tiles.size());
    room_left_ = device + host - facts_.resident_bytes;
  }

  std::vector<RingPool> pools() {
    std::array<std::int64_t, kPools> largest{};
    for (const RingTile& tile : parts_) {
      if (tile.home != TileHome::disk) continue;
      auto& of_pool = largest[static_cast<std::size_t>(tile.pool)];
      of_pool = std::max(of_pool, tile.bytes);
    }
    const std::int64_t head = std::min(kHeadRingBytes, ring_bytes_);
    const std::vector<RingPool> out = {
        {largest[kAttentionPool], narrow<int>(kLayerSlots)},
        {largest[kFeedForwardPool], narrow<int>(kLayerSlots)},
        {largest[kExpertPool], narrow<int>(ring_slots(largest[kExpertPool], ring_bytes_))},
        {largest[kHeadPool], narrow<int>(ring_slots(largest[kHeadPool], head))}};
    for (const RingPool& pool : out) facts_.ring_bytes += pool.slot_bytes * pool.slots;
    return out;
  }

  /// Slots that whole tiles are gathered into.
  std::vector<RingPool> gather_pools() {
    std::vector<RingPool> out(kPools);
    for (const RingTile& tile : map_.tiles) {
      RingPool& pool = out[static_cast<std::size_t>(tile.pool)];
      pool.slot_bytes = std::max(pool.slot_bytes,
                                 facts_.ranks * tile_share(tile.bytes, 0, facts_.ranks).part_bytes);
      const bool layer = tile.pool == kAttentionPool || tile.pool == kFeedForwardPool;
      pool.slots = narrow<int>(layer ? kLayerSlots : kGatherSlots);
    }
    for (const RingPool& pool : out) facts_.ring_bytes += pool.slot_bytes * pool.slots;
    return out;
  }

  /// Slots on a device, of all that does not stay there.
  std::vector<RingPool> device_pools() const {
    std::vector<RingPool> out(kPools);
    for (const RingTile& tile : parts_) {
      RingPool& pool = out[static_cast<std::size_t>(tile.pool)];
      if (tile.home != TileHome::device) pool.slot_bytes = std::max(pool.slot_bytes, tile.bytes);
      pool.slots = narrow<int>(tile.pool == kExpertPool ? kDeviceExpertSlots
                               : tile.pool == kHeadPool ? kDeviceHeadSlots
                                                        : kLayerSlots);
    }
    return out;
  }

  const std::vector<int>& order_of(Pass pass) {
    std::vector<int>& order = orders_[pass];
    if (!order.empty()) return order;
    const auto add_experts = [&](std::size_t l) {
      for (std::int64_t t = 0; map_.first_expert_tile[l] >= 0 && t < map_.expert_tiles; ++t) {
        order.push_back(map_.first_expert_tile[l] + narrow<int>(t));
      }
    };
    for (std::size_t l = 0; l < map_.attention.size(); ++l) {
      order.push_back(map_.attention[l]);
      order.push_back(map_.feed_forward[l]);
      add_experts(l);
    }
    if (pass == Pass::layers) return order;
    order.insert(order.end(), map_.head.begin(), map_.head.end());
    if (pass == Pass::forward || pass == Pass::generate) return order;
    for (std::size_t l = map_.attention.size(); l-- > 0;) {
      if (pass == Pass::train_recompute) order.push_back(map_.attention[l]);
      order.push_back(map_.feed_forward[l]);
      add_experts(l);
      if (pass == Pass::train_kept) order.push_back(map_.attention[l]);
    }
    return order;
  }

  // ------------------------------------------------------------------ bytes
  const StoredUnit* unit_of(int tile, std::size_t index) const {
    return map_.units[static_cast<std::size_t>(tile)][index];
  }
  static std::vector<EncodedMatrix> matrices_of(const StoredUnit& unit, const std::byte* bytes) {
    std::vector<EncodedMatrix> out;
    out.reserve(unit.matrices.size());
    for (const MatrixPlace& place : unit.matrices) out.push_back(place.in(bytes));
    return out;
  }

  Lease acquire(int tile) {
    Lease lease = ring_->acquire(tile);
    const std::byte* bytes = lease.bytes();
    for (const StoredUnit* unit : map_.units[static_cast<std::size_t>(tile)]) {
      store_->check_header(*unit, bytes);
      bytes += unit->bytes;
    }
    return lease;
  }

  /// On the reading thread: the first time, all of a tile's bits.
  void check(int tile, const std::byte* bytes) {
    auto& checked = checked_[static_cast<std::size_t>(tile)];
    if (checked != 0) return;
    for (const StoredUnit* unit : map_.units[static_cast<std::size_t>(tile)]) {
      store_->check_header(*unit, bytes);
      store_->check_hash(*unit, bytes);
      bytes += unit->bytes;
    }
    checked = 1;
  }

  std::exception_ptr failed(int tile, const BlockDone& done) const {
    const std::string where = store_->where(*unit_of(tile, 0)) + "; failed at byte " +
                              std::to_string(done.failed_offset) + " of the file";
    if (done.cut_off) {
      return std::make_exception_ptr(
          Error(Fault::io, {"the store's file ends inside a tile", where,
                            "The file was cut off. Check the disk, then pack the model again."}));
    }
    return std::make_exception_ptr(
        io_error(done.error_number, "cannot read a tile of the store", where));
  }

  // ------------------------------------------------------------------ embedding and norm
  std::pair<const StoredUnit*, std::int64_t> embedding_row(std::int32_t id) const {
    const std::int64_t run = vocabulary_run_rows(spec_);
    const std::int64_t first = id / run * run;
    return {store_->layout().find({UnitKind::embedding, 0, first}), id - first};
  }

  static void copy_row(const EncodedMatrix& matrix, std::int64_t row,
                       const std::vector<std::int64_t>& tokens, const at::Tensor& out_TD) {
    EncodedMatrix one = matrix;
    const std::int64_t row_bytes = code_bytes(matrix.format, 1, matrix.columns);
    one.codes += row * row_bytes;
    one.rows = 1;
    const at::Tensor first = out_TD.narrow(0, tokens.front(), 1);
    decode(one, first);
    for (std::size_t i = 1; i < tokens.size(); ++i) out_TD.narrow(0, tokens[i], 1).copy_(first);
  }

  void load_norm(const StreamOptions& options) {
    BlockReader::Options reader_options = options.reader;
    if (facts_.reader.engine ==
        BlockReader::Engine::io_uring) {  // else it would be as many threads
      reader_options.depth = std::max(reader_options.depth, kRowsAtOnce);
    }
    rows_reader_ = BlockReader::create(reader_options);
    for (const StoreLayout::File& file : store_->layout().files) {
      rows_reader_->add_file(inside_folder(store_->folder(), file.name));
    }
    const StoredUnit& norm = *wanted({UnitKind::final_norm, 0, 0});
    const AlignedMemory memory = read_unit(norm);
    norm_D_ = at::empty({1, spec_.hidden}, at::TensorOptions(dtype_));
    decode(norm.matrices[0].in(memory.data()), norm_D_);
    norm_D_ = norm_D_[0];
    const StoredUnit& first = *wanted({UnitKind::embedding, 0, 0});
    const WeightKind kind = first.matrices[0].format.kind;
    if (kind != WeightKind::bf16 && kind != WeightKind::f32) {
      throw Error(Fault::bad_file, {"a quantised embedding is not supported", store_->where(first),
                                    "Pack from a checkpoint whose embedding "
                                    "is F32, F16 or BF16."});
    }
    // Where all tiles fit, the embedding stays as well if there is room; else rows are read.
    const auto& file = store_->layout().files[static_cast<std::size_t>(first.file)];
    const bool unlimited = !options.device_bytes && !options.host_bytes;
    facts_.embedding_bytes = file.bytes;
    if (facts_.ranks > 1) return keep_rows(unlimited);
    if (facts_.streamed.forward > 0 || (!unlimited && room_left_ < file.bytes)) return;
    embedding_ = AlignedMemory(file.bytes);
    for (const StoredUnit& unit : store_->layout().units) {
      if (unit.id.kind != UnitKind::embedding) continue;
      read_into(unit, embedding_.data() + unit.offset);
    }
    facts_.resident_bytes += file.bytes;
  }

  /// Of several ranks none holds a whole embedding: each keeps of what it has read as much as would
  /// be its part.
  void keep_rows(bool unlimited) {
    const std::int64_t row_bytes = code_bytes(row_format(), 1, spec_.hidden);
    std::int64_t rows = spec_.vocab / facts_.ranks;
    if (!unlimited) rows = std::clamp<std::int64_t>(room_left_ / row_bytes, 0, rows);
    if (rows > 0) rows_kept_ = RowCache(rows, row_bytes);
    facts_.kept_row_bytes = rows_kept_.memory_bytes();
  }
  WeightFormat row_format() const { return embedding_row(0).first->matrices[0].format; }

  AlignedMemory read_unit(const StoredUnit& unit) {
    AlignedMemory memory(unit.bytes);
    read_into(unit, memory.data());
    return memory;
  }
  void read_into(const StoredUnit& unit, std::byte* to) {
    rows_reader_->submit({narrow<int>(unit.file), unit.offset, unit.bytes, unit.bytes, to, 0});
    const BlockDone done = rows_reader_->wait();
    if (!done.good()) {
      throw io_error(done.error_number == 0 ? EIO : done.error_number, "cannot read the store",
                     store_->where(unit));
    }
    store_->check_header(unit, to);
    store_->check_hash(unit, to);
  }

  /// Asked for together: the disk has its queue full of tiles, and every row that waits for the one
  /// before it waits for that queue once more.
  static constexpr int kRowsAtOnce = 256;

  void read_rows(const std::map<std::int32_t, std::vector<std::int64_t>>& tokens_of,
                 const at::Tensor& out_TD) {
    const StoredUnit& any = *embedding_row(0).first;
    const std::int64_t row_bytes = code_bytes(any.matrices[0].format, 1, spec_.hidden);
    const std::int64_t slot = align_up(row_bytes, kBlockBytes) + kBlockBytes;
    if (row_slots_.size() == 0) row_slots_ = AlignedMemory(kRowsAtOnce * slot);
    std::vector<BlockRead> reads;
    struct Row {
      std::int64_t first;  ///< byte of what is read
      std::int32_t id;
      const std::vector<std::int64_t>* tokens;
    };
    std::vector<Row> rows;
    const auto flush = [&] {
      const double began = seconds_now();
      rows_reader_->submit(reads);
      std::exception_ptr failure;
      for (std::size_t i = 0; i < reads.size(); ++i) {
        const BlockDone done = rows_reader_->wait();
        if (!done.good() && !failure) {
          failure = std::make_exception_ptr(
              io_error(done.error_number == 0 ? EIO : done.error_number,
                       "cannot read rows of the embedding", store_->where(any)));
        }
      }
      row_stall_seconds_ += seconds_now() - began;
      if (failure) std::rethrow_exception(failure);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const std::byte* const codes = reads[i].to + rows[i].first;
        copy_row({any.matrices[0].format, 1, spec_.hidden, codes, nullptr}, 0, *rows[i].tokens,
                 out_TD);
        rows_kept_.keep(rows[i].id, codes);
        row_bytes_ += reads[i].bytes;
      }
      reads.clear();
      rows.clear();
    };
    for (const auto& [id, tokens] : tokens_of) {
      const auto [unit, row] = embedding_row(id);
      const std::int64_t from = unit->offset + unit->matrices[0].codes_offset + row * row_bytes;
      const std::int64_t begin = from / kBlockBytes * kBlockBytes;
      const std::int64_t end = align_up(from + row_bytes, kBlockBytes);
      std::byte* to = row_slots_.data() + static_cast<std::size_t>(slot) * reads.size();
      reads.push_back({narrow<int>(unit->file), begin, end - begin, end - begin, to, reads.size()});
      rows.push_back({from - begin, id, &tokens});
      if (std::ssize(reads) == kRowsAtOnce) flush();
    }
    if (!reads.empty()) flush();
  }

  std::shared_ptr<const Store> store_;
  ModelSpec spec_;
  at::ScalarType dtype_;
  TileMap map_;
  std::vector<RingTile> parts_;  ///< this rank's of each tile
  std::vector<int> part_of_tile_, tile_of_part_;
  StreamFacts facts_;
  std::int64_t ring_bytes_ = 0;  ///< of the slots of experts
  std::int64_t room_left_ = 0;
  std::vector<char> checked_;
  std::map<Pass, std::vector<int>> orders_;
  std::unique_ptr<TileSource> ring_;
  at::Tensor norm_D_;
  AlignedMemory embedding_, row_slots_;
  RowCache rows_kept_;
  std::unique_ptr<BlockReader> rows_reader_;
  std::int64_t row_bytes_ = 0;
  double row_stall_seconds_ = 0;
};

}  // namespace

std::unique_ptr<StoreWeights> StoreWeights::open(std::shared_ptr<const Store> store,
                                                 at::ScalarType dtype,
                                                 const StreamOptions& options) {
  return std::make_unique<StoreStream>(std::move(store), dtype, options);
}

}  // namespace tailor
