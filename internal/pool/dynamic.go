// This file asks dynamic sources which upstreams there are.

package pool

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// answer is what a dynamic source said. It is not changed.
type answer struct {
	upstreams []*upstream // without those that are configured as well
	byName    map[string]*upstream
}

// askTimeout bounds one question to a dynamic source, which a client waits for.
const askTimeout = 5 * time.Second

// errEmpty is what an answer without upstreams counts as. Sources that ask several
// others say no more when all of those have failed.
var errEmpty = errors.New("there are none")

// ask returns the addresses of the upstreams that a source has for a request, at
// least one. What is no address is left out, and wrong says why.
func (p *Pool) ask(ctx context.Context, r *http.Request) (addrs []Address, wrong, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	theirs, err := p.Dynamic.GetUpstreams(r.WithContext(&within{ctx, r.Context()}))
	if err != nil {
		return nil, nil, err
	}
	seen := make(map[string]bool, len(theirs))
	for _, t := range theirs {
		if seen[t.Dial] {
			continue
		}
		seen[t.Dial] = true
		a, err := ParseAddress(t.Dial)
		if err != nil {
			wrong = err
			continue
		}
		addrs = append(addrs, a)
	}
	if len(addrs) == 0 {
		return nil, nil, cmp.Or(wrong, errEmpty)
	}
	return addrs, wrong, nil
}

// within is a context that ends with one and has the values of another.
type within struct {
	context.Context
	values context.Context //nolint:containedctx // for its values
}

func (w *within) Value(key any) any { return w.values.Value(key) }

// refresh asks the source for itself and reports whether connections may have to
// leave upstreams by its answer. Only follow calls it.
func (p *Pool) refresh(ctx context.Context) (leaving bool) {
	p.tidy()
	addrs, wrong, err := p.ask(ctx, p.request(ctx))
	if ctx.Err() != nil {
		return false
	}
	if failed := err != nil; failed != p.askFailed {
		p.askFailed = failed
		if failed {
			p.Logger.Error("dynamic upstreams have no answer; what was known goes on being true",
				zap.String("route", p.route.Name()), zap.Error(err))
		} else {
			p.Logger.Info("dynamic upstreams have an answer again", zap.String("route", p.route.Name()))
		}
	}
	if err != nil {
		return false
	}
	old := p.answer.Load()
	next := &answer{byName: make(map[string]*upstream, len(addrs))}
	names := make([]string, 0, len(addrs))
	var fresh []*upstream
	for _, addr := range addrs {
		names = append(names, addr.Name)
		if p.configured(addr.Name) != nil {
			continue // it is looked after, and one of the pool's in any case
		}
		u := old.get(addr.Name)
		if u == nil {
			u = newUpstream(addr.Name, addr)
			fresh = append(fresh, u)
		}
		next.upstreams = append(next.upstreams, u)
		next.byName[addr.Name] = u
	}
	var gone []*upstream
	for _, u := range old.all() {
		if next.byName[u.key] == nil {
			gone = append(gone, u)
		}
	}
	if old != nil && len(gone) == 0 && len(fresh) == 0 {
		return false
	}
	if wrong != nil {
		p.Logger.Warn("a dynamic upstream is left out", zap.String("route", p.route.Name()), zap.Error(wrong))
	}
	if !p.accept(next, fresh, gone) {
		return false
	}
	p.Logger.Info("dynamic upstreams have changed", zap.String("route", p.route.Name()), zap.Strings("upstreams", names))
	// Connections may be at upstreams of an earlier config, of which nobody knew
	// before the first answer whether they stay.
	return old == nil || len(gone) > 0
}

// accept makes an answer the one that counts, unless the pool has stopped.
func (p *Pool) accept(a *answer, fresh, gone []*upstream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running {
		return false
	}
	for _, u := range fresh {
		p.adopt(u)
	}
	p.answer.Store(a)
	maps.DeleteFunc(p.handed, func(key string, _ bool) bool { return a.byName[registry.UpstreamName(key)] != nil })
	for _, u := range gone {
		p.drop(u)
	}
	return true
}

// configured returns the configured upstream of that name, or nil.
func (p *Pool) configured(name string) *upstream {
	for _, u := range p.static {
		if u.key == name {
			return u
		}
	}
	return nil
}

// hand notes that a connection was given an upstream that may not be in the last
// answer. Its place there is taken.
func (p *Pool) hand(u *upstream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.answer.Load().get(registry.UpstreamName(u.key)) == nil {
		p.handed[u.key] = true
	}
}

// tidy forgets what hand noted of upstreams without connections.
func (p *Pool) tidy() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.route.Loads(func(load func(string) registry.Load) {
		maps.DeleteFunc(p.handed, func(key string, _ bool) bool { return load(key).Conns == 0 })
	})
}

func (a *answer) get(name string) *upstream {
	if a == nil {
		return nil
	}
	return a.byName[name]
}

func (a *answer) all() []*upstream {
	if a == nil {
		return nil
	}
	return a.upstreams
}

// dynamic returns the upstreams that the source has for a request. If it has no
// answer, the configured ones take over, or else those of its last answer.
func (p *Pool) dynamic(ctx context.Context, r *http.Request) []*upstream {
	known := p.answer.Load()
	addrs, _, err := p.ask(ctx, r)
	if err != nil {
		// follow has logged it, once, unless it is about this request.
		if e := p.Logger.Check(zap.DebugLevel, "getting dynamic upstreams"); e != nil {
			e.Write(zap.Error(err))
		}
		if len(p.static) > 0 {
			return p.static
		}
		return known.all()
	}
	ups := make([]*upstream, 0, len(addrs))
	for _, addr := range addrs {
		u := cmp.Or(p.configured(addr.Name), known.get(addr.Name))
		if u == nil {
			u = newUpstream(addr.Name, addr)
			u.fresh = true
		}
		ups = append(ups, u)
	}
	return ups
}
