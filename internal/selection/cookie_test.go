// This file tests the policy that keeps a client at its upstream by a cookie.

package selection

import (
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// cookieOf returns the one cookie that a header sets.
func cookieOf(t *testing.T, header http.Header) *http.Cookie {
	t.Helper()
	cookies := (&http.Response{Header: header}).Cookies()
	if len(cookies) != 1 || len(header) != 1 {
		t.Fatalf("got header %v, want one cookie", header)
	}
	return cookies[0]
}

func TestCookieKeepsTheUpstream(t *testing.T) {
	r := newRig(t, `{"policy":"cookie","name":"home","secret":"s"}`, 3)
	for range 1000 {
		home, header := r.connect(request("/"))
		cookie := cookieOf(t, header)
		if cookie.Name != "home" {
			t.Fatalf("got cookie %q, want home", cookie.Name)
		}
		back := request("/")
		back.AddCookie(cookie)
		i, header := r.connect(back)
		if i != home || header != nil {
			t.Fatalf("got upstream %d and header %v on return, want %d and none", i, header, home)
		}
	}
}

func TestCookieOfAnUnavailableUpstream(t *testing.T) {
	r := newRig(t, `{"policy":"cookie","fallback":{"policy":"first"}}`, 3)
	home, header := r.connect(request("/"))
	back := request("/")
	back.AddCookie(cookieOf(t, header))
	r.candidates[home].Available = false
	i, header := r.connect(back)
	if i == home {
		t.Errorf("got upstream %d, want another", i)
	}
	cookieOf(t, header) // the other's
	r.candidates[home].Available = true
	if i, header = r.connect(back); i != home || header != nil {
		t.Errorf("got upstream %d and header %v, want %d, which is back, and none", i, header, home)
	}
}

// Each choice has its own header: a client is told of the upstream that it got,
// and not of those that were tried in vain.
func TestCookieOfTheLastChoice(t *testing.T) {
	r := newRig(t, `{"policy":"cookie"}`, 3)
	req := request("/")
	first, _ := r.connect(req)
	r.candidates[first].Available = false
	second, header := r.connect(req)
	r.candidates[first].Available = true
	back := request("/")
	back.AddCookie(cookieOf(t, header))
	if i, _ := r.connect(back); i != second {
		t.Errorf("got upstream %d, want %d", i, second)
	}
}

func TestCookieAttributes(t *testing.T) {
	for name, c := range map[string]struct {
		tls, trusted bool
		proto        string
		secure       bool
	}{
		"plain":                       {},
		"TLS":                         {tls: true, secure: true},
		"TLS before a trusted proxy":  {trusted: true, proto: "https", secure: true},
		"none before a trusted proxy": {trusted: true, proto: "http"},
		"an untrusted one says so":    {proto: "https"},
	} {
		t.Run(name, func(t *testing.T) {
			req := httptest.NewRequest(http.MethodGet, "/a/b", nil)
			if c.tls {
				req.TLS = &tls.ConnectionState{HandshakeComplete: true}
			}
			if c.proto != "" {
				req.Header.Set("X-Forwarded-Proto", c.proto)
			}
			r := newRig(t, `{"policy":"cookie","max_age":"1h"}`, 3)
			_, header := r.connect(Prepare(req, "192.0.2.1", c.trusted))
			got := cookieOf(t, header)
			site := http.SameSiteLaxMode
			if c.secure {
				site = http.SameSiteNoneMode
			}
			if got.Name != "lb" || got.Path != "/" || !got.HttpOnly || got.MaxAge != int(time.Hour.Seconds()) {
				t.Errorf("got %v, want lb, Path=/, HttpOnly, Max-Age=3600", got)
			}
			if got.Secure != c.secure || got.SameSite != site {
				t.Errorf("got %v, want secure %v", got, c.secure)
			}
		})
	}
}

// What a policy says about an upstream that is not chosen is for nobody.
func TestNoHeaderWithoutUpstream(t *testing.T) {
	r := newProbe(t, func(v view) int {
		v.w.Header().Set("Set-Cookie", "a=b")
		return 1
	})
	r.candidates[1].Available = false
	if i, header := r.policy.Choose(r.candidates, request("/")); i != -1 || header != nil {
		t.Errorf("got upstream %d and header %v, want none", i, header)
	}
}
