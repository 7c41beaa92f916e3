// Package health probes upstreams while they are in a config, and tells those who
// use them when they become unhealthy and healthy again.
//
// A Probe looks at an upstream once; the settings describe it. Checkers repeat it
// and decide what the results mean. Nothing here knows of pools or connections.
package health

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// hurryPause is the shortest time from one probe's begin to the next's when
// somebody waits for the upstream.
const hurryPause = time.Second

// Checkers are the active checks of all upstreams. They belong to the process and
// not to a config: an upstream that stays keeps its state over a reload.
//
// Invariants:
//   - A key has one goroutine while it has a Watch, and none otherwise.
//   - A key has one probe at a time, and no key waits for another.
//   - Only a key's goroutine changes its health. It tells every Watch of one change
//     before it begins the next probe, so that what a notify is told holds while
//     it runs.
//   - A result counts only if its Watch has not stopped: nobody failed when we broke
//     a probe off, which then begins again for the Watch that counts now.
//   - Nothing of a stopped Watch is kept, neither Probe nor Logger: they may hold
//     on to an old config. (One that is being probed is kept until that has ended.)
type Checkers struct {
	mu       sync.Mutex // guards what follows and what checkers and Watches say; never held while somebody waits
	checkers map[string]*checker
}

// NewCheckers returns Checkers that check nothing yet.
func NewCheckers() *Checkers {
	return &Checkers{checkers: make(map[string]*checker)}
}

// Spec says what is checked, how often, and what the results mean. Durations are
// positive, counts at least 1.
type Spec struct {
	Interval time.Duration // from one probe's begin to the next's; up to 10 % less
	Timeout  time.Duration // of one probe
	Fails    int           // that many in a row make a healthy upstream unhealthy
	Passes   int           // that many in a row make an unhealthy one healthy

	// Probe looks once; the error says what is wrong. It must return soon after
	// ctx is done.
	Probe func(ctx context.Context) error

	Logger   *zap.Logger
	Upstream string // for logs
}

// Watch is one user's share in the checks of an upstream.
type Watch struct {
	checker *checker
	spec    Spec
	notify  func(healthy bool)
	ctx     context.Context // of its probes; done when it has stopped
	cancel  context.CancelFunc

	stopped bool          // guarded by Checkers.mu
	telling chan struct{} // guarded by Checkers.mu; closed when the notify that runs has returned, nil if none does
}

// Watch begins the checks of one upstream, or joins those that run under the same
// key. The key has the address and everything else that decides about the outcome of
// a probe; those who join find the state as it is. Where Specs differ in the rest,
// that of the newest Watch counts, since an older one may be of an old config.
//
// notify, which may be nil, is called after each change, one call after the other,
// from a goroutine that holds no lock, perhaps before Watch returns. It should
// return soon: the checks of this upstream wait for it. It may call Healthy and
// Hurry, but not Stop.
func (c *Checkers) Watch(key string, s Spec, notify func(healthy bool)) *Watch {
	w := &Watch{spec: s, notify: notify}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	c.mu.Lock()
	defer c.mu.Unlock()
	w.checker = c.checkers[key]
	if w.checker == nil {
		w.checker = &checker{owner: c, key: key, wake: make(chan struct{}, 1)}
		w.checker.healthy.Store(true)
		c.checkers[key] = w.checker
		go w.checker.run()
	}
	w.checker.watches = append(w.checker.watches, w)
	w.checker.rouse()
	return w
}

// Healthy reports the upstream's state: true until Fails probes in a row have
// failed. After Stop it is of no meaning.
func (w *Watch) Healthy() bool { return w.checker.healthy.Load() }

// Hurry says that somebody waits for this upstream: the next probe begins at once,
// but not within a second of the last one's begin. It is cheap, and may be called
// by all who wait.
func (w *Watch) Hurry() {
	if w.checker.hurried.CompareAndSwap(false, true) {
		w.checker.rouse()
	}
}

// Stop gives the share back; further calls do nothing more. The last one of a key
// ends its checks and breaks off the probe under way. It waits for a notify of this
// Watch that runs, and none begins after it: so it must not be called by
// that notify, nor under a lock that it takes.
func (w *Watch) Stop() {
	telling := w.checker.remove(w)
	w.cancel() // not before: what it breaks off must not count
	if telling != nil {
		<-telling
	}
}

// tell calls notify, unless the Watch has stopped.
func (w *Watch) tell(healthy bool) {
	if w.notify == nil {
		return
	}
	c, telling := w.checker.owner, make(chan struct{})
	c.mu.Lock()
	if w.stopped {
		c.mu.Unlock()
		return
	}
	w.telling = telling
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		w.telling = nil
		c.mu.Unlock()
		close(telling)
	}()
	w.notify(healthy)
}

// checker is the checks of one key.
type checker struct {
	owner   *Checkers
	key     string
	healthy atomic.Bool
	hurried atomic.Bool   // somebody has waited since the last probe began
	wake    chan struct{} // has room for one: however much has changed, run looks once

	// Guarded by owner.mu.
	watches []*Watch // in force, the newest last
	against int      // results in a row that contradict healthy

	// Of run alone.
	began time.Time // of the last probe that counts; zero: the next is due
	early float64   // the part of the interval by which the next is sooner
}

// run makes the probes of its key, one after the other. It owns nothing but the
// contexts of its probes; it ends when the last Watch has stopped.
func (k *checker) run() {
	for {
		switch w, wait := k.next(); {
		case w == nil:
			return
		case wait > 0:
			select {
			case <-time.After(wait):
			case <-k.wake:
			}
		default:
			ctx, cancel := context.WithTimeout(w.ctx, w.spec.Timeout)
			err := w.spec.Probe(ctx)
			cancel()
			k.count(w, err)
		}
	}
}

// next returns the Watch that counts and the time until its probe is due, which
// begins if there is none; and nil if no Watch is left.
func (k *checker) next() (*Watch, time.Duration) {
	k.owner.mu.Lock()
	defer k.owner.mu.Unlock()
	if len(k.watches) == 0 {
		return nil, 0
	}
	w := k.watches[len(k.watches)-1]
	if !k.began.IsZero() {
		pause := w.spec.Interval - time.Duration(k.early*float64(w.spec.Interval))
		if k.hurried.Load() {
			pause = min(pause, hurryPause)
		}
		if wait := pause - time.Since(k.began); wait > 0 {
			return w, wait
		}
	}
	k.hurried.Store(false)
	k.began, k.early = time.Now(), rand.Float64()/10
	return w, 0
}

// count takes a result in, and tells all Watches if it has changed the state.
func (k *checker) count(w *Watch, err error) {
	k.owner.mu.Lock()
	if w.stopped {
		k.owner.mu.Unlock()
		k.began = time.Time{}
		return
	}
	spec := k.watches[len(k.watches)-1].spec
	healthy, passed := k.healthy.Load(), err == nil
	needed := spec.Fails
	if !healthy {
		needed = spec.Passes
	}
	if passed == healthy {
		k.against = 0
	} else {
		k.against++
	}
	changed := passed != healthy && k.against >= needed
	var told []*Watch
	if changed {
		k.against = 0
		k.healthy.Store(passed)
		told = slices.Clone(k.watches)
	}
	k.owner.mu.Unlock()

	logger := spec.Logger.With(zap.String("upstream", spec.Upstream))
	if !passed {
		logger.Debug("health check failed", zap.Error(err))
	}
	switch {
	case changed && passed:
		logger.Info("upstream is healthy")
	case changed:
		logger.Info("upstream is unhealthy", zap.Error(err))
	}
	for _, w := range told {
		w.tell(passed)
	}
}

// remove takes a Watch out, and its key with the last one. It returns what is
// closed when the Watch's notify has returned, nil if none runs.
func (k *checker) remove(w *Watch) (telling <-chan struct{}) {
	k.owner.mu.Lock()
	defer k.owner.mu.Unlock()
	if w.stopped {
		return w.telling
	}
	w.stopped = true
	k.watches = slices.DeleteFunc(k.watches, func(other *Watch) bool { return other == w })
	if len(k.watches) == 0 {
		delete(k.owner.checkers, k.key)
	}
	k.rouse()
	return w.telling
}

// rouse has run look again.
func (k *checker) rouse() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}
