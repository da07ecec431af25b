#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <iostream>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "recipes/shipped.h"
#include "tools/launch/client.h"
#include "tools/launch/kubernetes.h"
#include "tools/launch/skypilot.h"
#include "tools/launch/slurm.h"
#include "tools/launch/slurm_log.h"
#include "tools/paths.h"
#include "tools/planning.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

using Cluster = LaunchJobArguments::Cluster;

constexpr double kMemorySlack = 1.1;  // over the plan's peak

std::string cluster_name(Cluster cluster) {
  return cluster == Cluster::slurm        ? "slurm"
         : cluster == Cluster::kubernetes ? "kubernetes"
                                          : "skypilot";
}

/// Bytes of "64GiB", "64GB", "0"; read as the recipe reads sizes.
std::int64_t memory_bytes(const std::string& text) {
  const Error refused(Fault::usage,
                      {"--memory is '" + text + "', needed: a size", "the command line",
                       "Write bytes or a size with its unit, such as 64GiB."});
  try {
    const Recipe recipe = read_recipe_text("base_model: m\noutput_dir: o\ndata: {train: [d]}\n",
                                           "--memory", std::array{"base.host_memory=" + text})
                              .recipe;
    if (recipe.base.host_memory) return *recipe.base.host_memory;
  } catch (const Error&) {  // in words about the recipe
  }
  throw Error(refused);
}

/// A recipe as a job: read, planned for its nodes, and laid out.
class JobMaker {
 public:
  explicit JobMaker(const LaunchJobArguments& arguments)
      : arguments_(arguments),
        path_(fs::absolute(find_recipe(arguments.recipe, recipes_folder()))),
        resolved_(resolve_recipe(arguments.recipe, arguments.overrides)),
        machine_(recipe_machine(recipe())) {
    lay_out();
    plan();
  }

  const LaunchJob& job() const { return job_; }
  const Plan& planned() const { return plan_; }
  const Machine& machine() const { return machine_; }
  const Recipe& recipe() const { return resolved_.file.recipe; }

  /// The job file's text.
  std::string text() const {
    if (arguments_.cluster == Cluster::slurm) return slurm_script(slurm());
    if (arguments_.cluster == Cluster::skypilot) {
      SkyPilotJob sky{job_, path_, arguments_.image, arguments_.bucket,
                      arguments_.spot || plan_.price.kind == "spot"};
      return skypilot_task(sky);
    }
    const KubernetesJob kubernetes{job_,
                                   read_text(path_),
                                   arguments_.image,
                                   arguments_.volume,
                                   arguments_.name_space,
                                   arguments_.queue};
    return arguments_.kind == "TrainJob" ? kubernetes_train_job(kubernetes)
                                         : kubernetes_job(kubernetes);
  }

  SlurmJob slurm() const {
    return {job_, arguments_.partition, arguments_.account, fs::current_path()};
  }

  /// What the plan says, in a few lines for people.
  std::string summary() const {
    std::string out = recipe().name + " on " + cluster_name(arguments_.cluster) + ": " +
                      std::to_string(job_.ranks) + (job_.ranks == 1 ? " rank on " : " ranks on ") +
                      std::to_string(job_.nodes) + (job_.nodes == 1 ? " node" : " nodes");
    if (job_.gpus_per_node > 0) {
      out += " with " + std::to_string(job_.gpus_per_node) +
             (job_.gpus_per_node == 1 ? " GPU" : " GPUs");
    }
    out += "\n  planned: ";
    if (plan_.hours.value && plan_.gpu_hours.value) {
      out += seconds_text(*plan_.hours.value * 3600) + ", " +
             number_text(*plan_.gpu_hours.value, 3) + " device hours, ";
      out += plan_.usd.value ? usd_text(std::llround(*plan_.usd.value * 1e6))
                             : "dollars not known (" + plan_.usd.working + ")";
    } else {
      out += "hours and dollars not known (" + plan_.hours.working + ")";
    }
    return out + (plan_.fits ? "" : "; it does not fit");
  }

  std::vector<std::string> warnings() const {
    std::vector<std::string> out = plan_.warnings;
    if (!recipe().machine.profile) {
      out.emplace_back(
          "the plan is for this machine; set machine.profile to the cluster's nodes for theirs");
    }
    if (job_.nodes > 1 && machine_.kind == Machine::Kind::cuda) {
      out.emplace_back(
          "the plan takes the network between nodes to be as fast as the links inside");
    }
    return out;
  }

 private:
  void lay_out() {
    const bool cuda = machine_.kind == Machine::Kind::cuda;
    job_.name = job_name(recipe().name);
    job_.ranks = recipe().machine.ranks;
    const int fit = cuda ? std::max(1, machine_.devices) : job_.ranks;
    job_.nodes = arguments_.nodes > 0 ? arguments_.nodes : (job_.ranks + fit - 1) / fit;
    if (job_.ranks % job_.nodes == 0) {
      job_.gpus_per_node = arguments_.gpus_per_node >= 0 ? arguments_.gpus_per_node
                           : cuda                        ? job_.ranks / job_.nodes
                                                         : 0;
    }
    check_places(job_);
    job_.gpu_type = arguments_.gpu_type;
    if (job_.gpu_type.empty() && arguments_.cluster == Cluster::skypilot) {
      job_.gpu_type = skypilot_accelerator(machine_.sku);
    }
    job_.cpus_per_rank = arguments_.cpus_per_rank > 0 ? arguments_.cpus_per_rank
                                                      : recipe().compute.threads.value_or(0);
    if (!arguments_.time.empty()) job_.seconds_max = time_limit_seconds(arguments_.time);
    job_.restarts_max = arguments_.restarts_max;
    job_.overrides = arguments_.overrides;
    const bool here = arguments_.cluster == Cluster::slurm;
    job_.recipe = path_.string();
    job_.program = !arguments_.program.empty() ? arguments_.program
                   : here                      ? own_program().string()
                                               : "tailor";
  }

  /// Several nodes are planned as one machine with all that they have together.
  void plan() {
    Machine together = machine_;
    together.devices *= job_.nodes;
    together.host_bytes *= job_.nodes;
    together.disk_bytes_per_second *= job_.nodes;
    together.cores *= job_.nodes;
    PlanExtras extras;
    extras.data = data_stats(recipe(), CountData::for_steps);
    extras.calibration = calibration_of(recipe(), resolved_.facts, machine_, Measure::never);
    extras.at_unix_ms = RealClock().unix_ms();
    plan_ = make_plan(recipe(), resolved_.facts, together, price_books(), extras);
    if (!arguments_.memory.empty()) {
      job_.memory_bytes = memory_bytes(arguments_.memory);
    } else if (plan_.host_bytes_peak.value) {
      job_.memory_bytes = std::llround(*plan_.host_bytes_peak.value * kMemorySlack /
                                       static_cast<double>(job_.nodes));
    }
  }

  const LaunchJobArguments& arguments_;
  fs::path path_;
  ResolvedRecipe resolved_;
  Machine machine_;
  LaunchJob job_;
  Plan plan_;
};

/// Hands the file to the cluster; the job's number or name there.
std::string submit(const LaunchJobArguments& arguments, const JobMaker& maker,
                   const std::string& file) {
  if (arguments.cluster == Cluster::slurm) {
    const std::string printed = client_output({"sbatch", "--parsable", file});
    if (const auto job = submitted_job(printed)) return *job;
    throw Error(Fault::device, {"sbatch gave no job number: " + std::string(trim(printed)), file,
                                "`squeue --me` shows whether the job is there."});
  }
  if (arguments.cluster == Cluster::kubernetes) {
    client_output({"kubectl", "apply", "-f", file});
  } else {
    client_output({"sky", "jobs", "launch", "--yes", "--detach-run", file});
  }
  return maker.job().name;
}

/// The job's log until it ends, on stdout (stderr with --json), and its exit code.
int follow(const LaunchJobArguments& arguments, const std::string& job) {
  if (arguments.cluster == Cluster::slurm) return follow_slurm(job, arguments.json ? 2 : 1);
  std::vector<std::string> command = {"sky", "jobs", "logs", "--follow", "--name", job};
  if (arguments.cluster == Cluster::kubernetes) {
    command = {"kubectl",
               "logs",
               "--follow",
               "--prefix",
               "--pod-running-timeout=24h",
               "--selector",
               "app.kubernetes.io/instance=" + job};
    if (arguments.kind == "TrainJob") command.back() = "jobset.sigs.k8s.io/jobset-name=" + job;
    if (!arguments.name_space.empty()) command.push_back("--namespace=" + arguments.name_space);
  }
  return show_client(command);
}

}  // namespace

int run_launch_job(const LaunchJobArguments& arguments) {
  const JobMaker maker(arguments);
  std::cerr << maker.summary() << "\n";
  for (const std::string& warning : maker.warnings()) log_warning(warning);
  if (!maker.planned().fits && !arguments.force) {
    const Error misfit = does_not_fit(maker.planned());
    throw Error(Fault::does_not_fit, {misfit.parts().what, misfit.parts().where,
                                      misfit.parts().mend + " --force launches it all the same."});
  }
  const std::string text = maker.text();
  std::string file = arguments.out;
  if (file.empty() && !arguments.dry_run) {
    file = maker.job().name + (arguments.cluster == Cluster::slurm ? ".sh" : ".yaml");
  }
  if (!file.empty()) {
    write_atomically(file, text);
    log_info("wrote " + file);
  }
  std::string job;
  if (!arguments.dry_run) {
    job = submit(arguments, maker, file);
    const std::string cluster = cluster_name(arguments.cluster);
    log_info("submitted job " + job + "; its state and cost: tailor launch status " + job +
             (arguments.cluster == Cluster::slurm ? "" : " --on " + cluster));
  }
  const int code = arguments.follow && !arguments.dry_run ? follow(arguments, job) : 0;
  if (arguments.json) {
    const auto number = [](const Figure& figure) {
      return figure.value ? Json(*figure.value) : Json();
    };
    const Plan& plan = maker.planned();
    Json out = {{"cluster", cluster_name(arguments.cluster)},
                {"name", maker.job().name},
                {"job", job.empty() ? Json() : Json(job)},
                {"file", file.empty() ? Json() : Json(file)},
                {"text", text},
                {"ranks", maker.job().ranks},
                {"nodes", maker.job().nodes},
                {"gpus_per_node", maker.job().gpus_per_node},
                {"fits", plan.fits},
                {"hours", number(plan.hours)},
                {"gpu_hours", number(plan.gpu_hours)},
                {"usd", number(plan.usd)}};
    std::cout << out.dump(2) << "\n";
  } else if (arguments.dry_run && file.empty()) {
    std::cout << text;
  } else if (!job.empty() && !arguments.follow) {
    std::cout << job << "\n";
  }
  return code;
}

}  // namespace tailor
