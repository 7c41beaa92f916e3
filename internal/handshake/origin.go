// This file holds allowed_origins: which web pages may open a WebSocket
// (RFC 6455 §10.2).

package handshake

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strings"
	"unicode/utf8"
)

// opaqueOrigin is what pages send that have no origin which they may tell
// (RFC 6454 §6.1).
const opaqueOrigin = "null"

// Origins are patterns of allowed origins. None allows all.
type Origins []originPattern

// originPattern is one pattern, in lower case.
type originPattern struct {
	text   string
	scheme bool // it is about scheme and host, not the host alone
}

// ParseOrigins reads patterns: `https://example.com:8443` with the scheme, or
// `example.com:8443` for any. In both `*` stands for any text, and the rest of
// path.Match's syntax works too. Only `null` allows the origin null.
func ParseOrigins(patterns []string) (Origins, error) {
	out := make(Origins, 0, len(patterns))
	for _, p := range patterns {
		o, err := parseOriginPattern(p)
		if err != nil {
			return nil, fmt.Errorf("allowed_origins: invalid pattern %q: %w", p, err)
		}
		out = append(out, o)
	}
	return out, nil
}

// allow reports whether r may open a WebSocket. What says no Origin is no browser,
// and could say any.
func (o Origins) allow(r *http.Request) bool {
	values := r.Header["Origin"]
	if len(o) == 0 || len(values) == 0 {
		return true
	}
	return len(values) == 1 && o.match(values[0])
}

func (o Origins) match(value string) bool {
	host := ""
	if value != opaqueOrigin {
		origin, err := parseOrigin(value)
		if err != nil {
			return false
		}
		value, host = origin.scheme+"://"+origin.host, origin.host
	}
	for _, p := range o {
		name := host
		if p.scheme {
			name = value
		}
		switch {
		case p.text == opaqueOrigin || value == opaqueOrigin:
			if p.text == value {
				return true
			}
		case name != "": // a file's origin has no host
			if ok, _ := path.Match(p.text, name); ok {
				return true
			}
		}
	}
	return false
}

// errors of patterns, each of which would never match.
var (
	errOriginEmpty = errors.New("it is empty")
	errOriginASCII = errors.New("hosts are in ASCII there, as xn--…")
	errOriginPath  = errors.New("an origin has scheme, host and port only")
)

func parseOriginPattern(pattern string) (originPattern, error) {
	p := originPattern{text: strings.ToLower(pattern)}
	scheme, host, ok := strings.Cut(p.text, "://")
	if p.scheme = ok; !ok {
		scheme, host = "", p.text
	}
	switch {
	case p.text == "" || ok && (scheme == "" || host == "" && scheme != "file"):
		return p, errOriginEmpty
	case !ascii(pattern):
		return p, errOriginASCII
	case strings.ContainsAny(host, "/#@") || strings.ContainsFunc(p.text, func(c rune) bool { return c <= ' ' || c == 0x7f }):
		return p, errOriginPath
	}
	// Brackets are those of an IPv6 address where one is in them, else a class.
	if inner, rest, ok := strings.Cut(strings.TrimPrefix(host, "["), "]"); ok && host[0] == '[' {
		if _, err := netip.ParseAddr(inner); err == nil {
			p.text = strings.TrimSuffix(p.text, host) + `\[` + inner + `\]` + rest
		}
	}
	_, err := path.Match(p.text, "")
	return p, err
}

// origin is what a browser says where a page is from, in lower case.
type origin struct {
	scheme string
	host   string // with the port; empty for a file
}

// parseOrigin reads an origin as RFC 6454 §6.1 has it written.
func parseOrigin(value string) (origin, error) {
	lower := strings.ToLower(value)
	u, err := url.Parse(lower)
	// What a URL may have besides, like a path, is not in its scheme and host.
	if err != nil || !ascii(value) || u.Scheme == "" || u.Scheme+"://"+u.Host != lower || !validHost(u) {
		return origin{}, fmt.Errorf("invalid origin %q", value)
	}
	return origin{scheme: u.Scheme, host: u.Host}, nil
}

// ascii reports whether s is in ASCII. Beyond, there are letters whose lower case is
// another's.
func ascii(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c >= utf8.RuneSelf })
}

// validHost reports whether a host is a name or an address. What else may stand in a
// URL is left out, lest a list of hosts match a pattern as one.
func validHost(u *url.URL) bool {
	if u.Hostname() == "" {
		return u.Host == "" && u.Scheme == "file"
	}
	if u.Port() == "" && strings.HasSuffix(u.Host, ":") {
		return false
	}
	if strings.HasPrefix(u.Host, "[") {
		_, err := netip.ParseAddr(u.Hostname())
		return err == nil
	}
	return !strings.ContainsFunc(u.Hostname(), func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_'
	})
}
