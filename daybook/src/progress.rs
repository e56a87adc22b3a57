//! A progress bar on standard error, for whoever watches; nothing when nobody does.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(doing: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = "{msg} [{bar:30}] {human_pos}/{human_len} ({per_sec}, {eta})";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed").progress_chars("=> "));
        bar.set_message(doing);
        Self(bar)
    }

    pub(crate) fn at(&self, done: i64, total: i64) {
        self.0.set_length(u64::try_from(total).unwrap_or(0));
        self.0.set_position(u64::try_from(done).unwrap_or(0));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
