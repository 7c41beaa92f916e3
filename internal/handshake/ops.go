// This file applies header_up: to a client's request when it arrives, or, if that
// needs to know the upstream, whenever one is dialed.

package handshake

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
)

// Upstream is the address of a backend.
type Upstream struct {
	Network string // of Go's net package
	Address string // likewise: a host and port, or the path of a socket
}

// placeholders returns what reverse_proxy says of an upstream, by the names below
// http.reverse_proxy.upstream.
func (u *Upstream) placeholders() map[string]string {
	host, port, err := net.SplitHostPort(u.Address)
	if err != nil || caddy.IsUnixNetwork(u.Network) {
		host, port = u.Address, "0"
	}
	return map[string]string{
		"address": caddy.JoinNetworkAddress(u.Network, host, port), "hostport": u.Address, "host": host, "port": port,
	}
}

// upstreamPrefix is how the placeholders of an upstream begin.
const upstreamPrefix = "http.reverse_proxy.upstream."

// apply applies ops to the header and the host of a request, and returns the host.
func apply(ops *headers.HeaderOps, h http.Header, host string, repl *caddy.Replacer) string {
	ctx := context.WithValue(context.Background(), caddy.ReplacerCtxKey, repl)
	r := (&http.Request{Header: h, Host: host}).WithContext(ctx)
	ops.ApplyToRequest(r)
	return r.Host
}

// lateOps are operations of which at least one depends on the upstream. Then all
// of them wait for the dial: they are applied in the order of reverse_proxy, and
// those that come later may undo, or build on, those that depend.
//
// The request is gone by then, and with it the values of its placeholders. So they
// are filled in when it arrives, in a copy that keeps the upstream's placeholders
// and in which everything else is literal, whatever a client wrote there.
type lateOps struct {
	config *headers.HeaderOps
	// common is the copy for every request, if none of its values is needed: then
	// connections need none of their own.
	common *headers.HeaderOps
}

// newLateOps returns nil for operations that do not depend on the upstream.
func newLateOps(config *headers.HeaderOps) (*lateOps, error) {
	if config == nil {
		return nil, nil
	}
	late, personal := false, false
	known := new(Upstream).placeholders()
	var err error
	mapped(config, func(text string) string {
		for rest := text; ; {
			var before, name string
			if before, name, rest = cutUpstream(rest); strings.Contains(before, "{") {
				personal = true
			}
			if name == "" {
				return text
			}
			late = true
			if _, ok := known[name]; !ok {
				err = fmt.Errorf("unsupported placeholder {%s%s}: of an upstream there are %s",
					upstreamPrefix, name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
			}
		}
	})
	if err != nil || !late {
		return nil, err
	}
	l := &lateOps{config: config}
	if !personal {
		l.common = l.fill(caddy.NewEmptyReplacer())
	}
	return l, nil
}

// of returns the operations for one request.
func (l *lateOps) of(repl *caddy.Replacer) *headers.HeaderOps {
	if l.common != nil {
		return l.common
	}
	return l.fill(repl)
}

func (l *lateOps) fill(repl *caddy.Replacer) *headers.HeaderOps {
	return mapped(l.config, func(text string) string {
		var b strings.Builder
		for {
			before, name, after := cutUpstream(text)
			b.WriteString(literal.Replace(repl.ReplaceKnown(before, "")))
			if name == "" {
				return b.String()
			}
			b.WriteString("{" + upstreamPrefix + name + "}")
			text = after
		}
	})
}

// literal writes text such that lateReplacer gives it back. Caddy's own escape, a
// backslash before a brace, would not do: text may end with one of its own.
var literal = strings.NewReplacer("{", "{open}", "}", "{close}", `\`, "{backslash}")

// lateReplacer knows the upstream, what literal wrote, and nothing else.
func lateReplacer(to *Upstream) *caddy.Replacer {
	repl := caddy.NewEmptyReplacer()
	repl.Set("open", "{")
	repl.Set("close", "}")
	repl.Set("backslash", `\`)
	setUpstream(repl, to)
	return repl
}

// setUpstream sets the placeholders of an upstream.
func setUpstream(repl *caddy.Replacer, u *Upstream) {
	for name, value := range u.placeholders() {
		repl.Set(upstreamPrefix+name, value)
	}
}

// upstreamHost is header_up for who removed Host: HTTP/1.1 needs one, and it is
// the upstream's then, as with reverse_proxy.
var upstreamHost = &headers.HeaderOps{Set: http.Header{"Host": {"{" + upstreamPrefix + "hostport}"}}}

// cutUpstream cuts text around its first placeholder of an upstream. name is empty
// if there is none.
func cutUpstream(text string) (before, name, after string) {
	for from := 0; ; {
		i := strings.Index(text[from:], "{"+upstreamPrefix)
		if i < 0 {
			return text, "", ""
		}
		i += from
		key, rest, closed := strings.Cut(text[i+1:], "}")
		if name := key[len(upstreamPrefix):]; closed && name != "" && (i == 0 || text[i-1] != '\\') {
			return text[:i], name, rest // its brace is not an escaped one
		}
		from = i + 1
	}
}

// mapped returns ops with every text that may hold placeholders replaced by f's
// answer. Compiled expressions stay.
func mapped(ops *headers.HeaderOps, f func(text string) string) *headers.HeaderOps {
	fields := func(h http.Header) http.Header {
		if h == nil {
			return nil
		}
		out := make(http.Header, len(h))
		for name, values := range h {
			name = f(name)
			for _, v := range values {
				out[name] = append(out[name], f(v))
			}
		}
		return out
	}
	out := &headers.HeaderOps{Add: fields(ops.Add), Set: fields(ops.Set)}
	for _, name := range ops.Delete {
		out.Delete = append(out.Delete, f(name))
	}
	for name, replacements := range ops.Replace {
		if out.Replace == nil {
			out.Replace = make(map[string][]headers.Replacement, len(ops.Replace))
		}
		name = f(name)
		for _, r := range replacements {
			r.Search, r.SearchRegexp, r.Replace = f(r.Search), f(r.SearchRegexp), f(r.Replace)
			out.Replace[name] = append(out.Replace[name], r)
		}
	}
	return out
}
